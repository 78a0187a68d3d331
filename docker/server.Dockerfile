# syntax=docker/dockerfile:1
# The proxy: an OpenAI-compatible server in front of vLLM. No torch, no vLLM.
#     docker build -f docker/server.Dockerfile -t undertow-server:0.1.0 .

FROM python:3.12.13-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /source
COPY requirements/server.lock requirements/build.lock requirements/
RUN python -m venv /opt/undertow \
    && /opt/undertow/bin/pip install --no-deps --require-hashes --only-binary=:all: -r requirements/server.lock \
    && pip install --no-deps --require-hashes --only-binary=:all: -r requirements/build.lock
COPY pyproject.toml README.md LICENSE ./
COPY guard guard
COPY server server
# setuptools comes from build.lock into the build stage only: nothing unpinned takes part, nothing of it ships.
RUN pip wheel --no-deps --no-build-isolation --no-index --wheel-dir /wheels . \
    && /opt/undertow/bin/pip install --no-deps --no-index /wheels/*.whl \
    && /opt/undertow/bin/python -m pip uninstall --yes pip \
    && /opt/undertow/bin/undertow serve --help >/dev/null

FROM python:3.12.13-slim-bookworm
ENV PATH=/opt/undertow/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
COPY --from=build /opt/undertow /opt/undertow
# Incidents are kept here, on a volume.
RUN install -d -o 10001 -g 10001 -m 0700 /var/lib/undertow
# A number, not a name: an orchestrator that insists on runAsNonRoot can check it.
USER 10001:10001
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/healthz', timeout=4)"]
ENTRYPOINT ["undertow"]
CMD ["serve", "--config", "/etc/undertow/undertow.yaml"]
