"""What serving costs on this machine: measured once, used by simulations and schedulers."""
