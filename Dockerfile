# One image for the code location, the daemon, the webserver, and every run and step pod.
FROM python:3.11-slim-bookworm AS build
WORKDIR /build
RUN python -m venv /venv
# The lock of the image has no development dependencies. Packages that differ from their hashes are refused.
COPY k8s/requirements.lock pyproject.toml README.md LICENSE ./
RUN /venv/bin/pip install --no-cache-dir --no-deps --require-hashes --requirement requirements.lock
COPY laion_assets laion_assets
RUN /venv/bin/pip install --no-cache-dir --no-deps . && /venv/bin/pip check
# The chart starts `dagster-webserver`; this one refuses what pages of other sites send.
RUN printf '#!/venv/bin/python\nfrom laion_assets.defs.webserver import main\nmain()\n' > /venv/bin/dagster-webserver

FROM python:3.11-slim-bookworm
RUN groupadd --gid 1000 laion \
    && useradd --uid 1000 --gid 1000 --create-home laion \
    && install --directory --owner laion --group laion /opt/dagster/dagster_home \
    # The chart's init containers wait for the code server with nslookup, which needs no image of its own.
    && printf '#!/bin/sh\nexec getent hosts "$1"\n' > /usr/local/bin/nslookup \
    && chmod 755 /usr/local/bin/nslookup
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 DAGSTER_HOME=/opt/dagster/dagster_home
# A number, because Kubernetes could not verify that a name is not root.
USER 1000:1000
WORKDIR /home/laion
