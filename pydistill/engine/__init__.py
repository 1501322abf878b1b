"""What runs the loss: checks, backends and the autograd boundary. Nothing here is public."""
