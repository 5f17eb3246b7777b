"""`python -m sslrun`, which launchers can start wherever sslrun is installed: `torchrun -m sslrun CONFIG`."""

from sslrun.cli import start

if __name__ == "__main__":
    start()
