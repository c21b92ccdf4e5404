"""crc32c, the checksum that buckets keep of every object.

What must not live here: anything but the checksum.
"""

import base64

import google_crc32c


def checksum_text(checksum: google_crc32c.Checksum) -> str:
    """Return a checksum the way Google Cloud Storage writes it: base64 of the big-endian bytes."""
    return base64.b64encode(checksum.digest()).decode("ascii")
