# Job worker on every client of a Nomad cluster: nomad job run nomad.hcl
#
# Put jobworker.pyz (./build.sh universal) at /opt/jobworker/jobworker.pyz of each client first. The driver raw_exec must
# be enabled there, and Nomad must run as root. Its arguments are tested; on a cluster it was not run.
job "jobworker" {
  type = "system"

  group "jobworker" {
    network {
      port "grpc" {
        static = 8010
      }
    }

    task "serve" {
      driver      = "raw_exec"
      kill_signal = "SIGTERM"

      config {
        command = "/usr/bin/python3"
        args    = ["/opt/jobworker/jobworker.pyz", "serve", "--listen", ":8010", "--name", "${attr.unique.hostname}", "--state", "/var/lib/jobworker", "--certs", "/etc/jobworker"]
      }
    }
  }
}
