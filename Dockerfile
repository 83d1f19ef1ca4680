# Telltale's images. Targets: cpu (the default) and cuda.
#
#   docker build --target cpu --build-arg EXTRA_INDEX_URL=<an index with PyTorch's CPU wheels> -t telltale:cpu .
#   docker build --target cuda -t telltale:cuda .
#   docker run --rm -p 8000:8000 -e VLLM_API_KEY telltale:cpu
#   docker run --rm --gpus all -p 8000:8000 -v $PWD/telltale.yaml:/etc/telltale.yaml telltale:cuda \
#       MODEL --policy /etc/telltale.yaml --host 0.0.0.0
#
# Others than the container reach the server, so it does not start without a key: in VLLM_API_KEY, or in the policy file.
#
# The package indexes are those of pip: PIP_INDEX_URL, PIP_EXTRA_INDEX_URL and EXTRA_INDEX_URL may be given as build arguments.
ARG PYTHON_IMAGE=python:3.12-slim-bookworm

FROM ${PYTHON_IMAGE} AS source
WORKDIR /opt/telltale
COPY . .

FROM source AS build-cpu
ARG PIP_INDEX_URL PIP_EXTRA_INDEX_URL EXTRA_INDEX_URL
RUN TELLTALE_DEVICE=cpu TELLTALE_EXTRAS='' UV_COMPILE_BYTECODE=1 UV_NO_CACHE=1 bash scripts/install.sh
# The embedded model is converted here, so that a container starts without writing 540 MB first; a layer of its own.
# hadolint ignore=DL3059
RUN TELLTALE_CACHE=/opt/telltale/cache .venv/bin/python -m serving.builtin

FROM source AS build-cuda
ARG PIP_INDEX_URL PIP_EXTRA_INDEX_URL EXTRA_INDEX_URL
RUN TELLTALE_DEVICE=cuda TELLTALE_EXTRAS='' UV_COMPILE_BYTECODE=1 UV_NO_CACHE=1 bash scripts/install.sh

FROM ${PYTHON_IMAGE} AS runtime
# vLLM compiles small pieces of C when it starts on a GPU.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home --shell /usr/sbin/nologin telltale
ENV PATH=/opt/telltale/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1
EXPOSE 8000
WORKDIR /home/telltale
# Ready means more than alive: the taps were seen to fire and the policy is in force.
HEALTHCHECK --interval=15s --timeout=5s --start-period=180s --retries=4 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
ENTRYPOINT ["telltale", "serve"]
CMD ["--host", "0.0.0.0", "--port", "8000"]

FROM runtime AS cuda
COPY --from=build-cuda /opt/telltale /opt/telltale
USER 10001:10001

FROM runtime AS cpu
COPY --from=build-cpu --chown=10001:10001 /opt/telltale/cache /home/telltale/.cache/telltale
COPY --from=build-cpu /opt/telltale /opt/telltale
USER 10001:10001
