"""A few seed images in, a large clean set of similar images from LAION out."""
