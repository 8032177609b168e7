"""Where processes come from: this machine, or a torchrun that has started them."""
