"""Where steps run on a cluster."""
