"""The kernel's interfaces as Python sees them: /proc, ptrace, pidfd, pagemap, feature probes."""
