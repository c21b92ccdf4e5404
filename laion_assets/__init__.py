"""Turn a few seed images into a large, clean set of similar images from LAION."""

import os

# ONNX Runtime reports to Microsoft which models it opens, unless this is set before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
