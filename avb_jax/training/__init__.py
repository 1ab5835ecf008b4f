"""The host's side of training: blocks of steps on devices, callbacks between them, checkpoints, run directories."""
