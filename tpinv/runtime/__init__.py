"""What kernels need of the machine: compilation (NVRTC), launches, tables and counters on a device."""
