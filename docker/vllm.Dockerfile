# syntax=docker/dockerfile:1
# vLLM with the guard inside its workers.
#     docker build -f docker/vllm.Dockerfile -t undertow-vllm:0.32.0 .
# The tag is exact because guard.engine refuses to start on a vLLM it does not know.

FROM vllm/vllm-openai:v0.32.0
WORKDIR /opt/undertow
COPY pyproject.toml README.md LICENSE ./
COPY guard guard
COPY server server
# --no-deps: what vLLM ships in this image is what it was tested with; the guard adapts to it, never the other way.
RUN uv pip install --system --no-deps --no-build-isolation --no-cache . \
    && python3 -c "from importlib.metadata import version; assert version('vllm').startswith('0.32.'), version('vllm')"
# The image's own user (uid 2000, group 0), with a home that vLLM may write to.
ENV HOME=/home/vllm
WORKDIR /home/vllm
USER 2000:0
EXPOSE 8000
# Loading a model takes minutes; until then the container is "starting", not "unhealthy".
HEALTHCHECK --interval=15s --timeout=10s --start-period=20m --retries=3 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=8)"]
ENTRYPOINT ["vllm", "serve"]
