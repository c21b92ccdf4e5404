"""Turn a few seed images into a large, clean set of similar images from LAION."""
