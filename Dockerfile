# Three images, each an environment of its own with every version pinned by constraints.txt:
#   api          HTTP before a queue in Redis; no torch, no compiler          docker build --target api -t millrace-api .
#   worker       engines on the CPU; also `serve`, everything in one process  docker build --target worker -t millrace-worker .
#   worker-cuda  engines on NVIDIA GPUs                                       docker build --target worker-cuda -t millrace-worker-cuda .
# All run as user 10001 and write nothing, so the root file system may be read-only. They carry the bundled model; any
# other folder is mounted and named. One container that serves the bundled model to this machine alone:
#   docker run --rm -p 127.0.0.1:8000:8000 millrace-worker serve --insecure-no-auth
#   docker run --rm -p 127.0.0.1:8000:8000 -v /path/to/model:/model:ro millrace-worker serve --insecure-no-auth --model /model
# Without a network to the package index: --build-arg PIP_NO_INDEX=1 --build-arg PIP_FIND_LINKS=/wheels -v $PWD/wheels:/wheels:ro
ARG PYTHON_IMAGE=docker.io/library/python:3.11.14-slim-bookworm
ARG CUDA_IMAGE=docker.io/nvidia/cuda:12.8.1-base-ubuntu24.04

# --- what runs in each ------------------------------------------------------------------------------------------------

FROM ${PYTHON_IMAGE} AS base
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini=0.19.* \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log \
    && useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin millrace

FROM ${CUDA_IMAGE} AS base-cuda
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3=3.12.* python3-venv=3.12.* tini=0.19.* \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log \
    && useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin millrace

# --- how each is made -------------------------------------------------------------------------------------------------

FROM base AS build-api
ARG PIP_NO_INDEX
ARG PIP_FIND_LINKS
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY constraints.txt deploy/requirements/api.txt ./
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/millrace \
    && /opt/pip/bin/pip --python /opt/millrace/bin/python install --quiet --no-deps -c constraints.txt -r api.txt
COPY pyproject.toml README.md LICENSE ./
COPY model model
COPY service service
RUN /opt/pip/bin/pip --python /opt/millrace/bin/python install --quiet --no-deps .

# The native core, for each kind of processor it knows; the one that fits is picked when an engine starts.
FROM base AS core
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++=4:12.* \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log
WORKDIR /src
COPY model model
RUN python3 -m model.native.build

FROM build-api AS build-worker
ARG PIP_NO_INDEX
ARG PIP_FIND_LINKS
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
COPY deploy/requirements/worker.txt ./
RUN /opt/pip/bin/pip --python /opt/millrace/bin/python install --quiet --no-deps -c constraints.txt -r worker.txt \
    && /opt/pip/bin/pip --python /opt/millrace/bin/python install --quiet --no-deps -c constraints.txt \
        --extra-index-url "${TORCH_INDEX_URL}" torch
COPY --from=core /src/model/native model/native
RUN /opt/pip/bin/pip --python /opt/millrace/bin/python install --quiet --no-deps --force-reinstall .

# What CUDA's torch needs beyond the CPU's is pinned by torch itself, to the version.
FROM base-cuda AS build-worker-cuda
ARG PIP_NO_INDEX
ARG PIP_FIND_LINKS
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/millrace \
    && /opt/pip/bin/pip --python /opt/millrace/bin/python install --quiet -c constraints.txt torch triton
COPY model model
COPY service service
RUN /opt/pip/bin/pip --python /opt/millrace/bin/python install --quiet -c constraints.txt .

# --- the images: what is largest comes last, so that nothing is stored on top of it ------------------------------------

FROM base AS api
LABEL org.opencontainers.image.title="millrace-api" \
      org.opencontainers.image.description="The HTTP half of Millrace, before a queue in Redis" \
      org.opencontainers.image.licenses="Apache-2.0"
USER 10001
WORKDIR /tmp
ENV PATH=/opt/millrace/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp \
    MILLRACE_HOST=0.0.0.0 MILLRACE_METRICS_HOST=0.0.0.0 MILLRACE_METRICS_PORT=9464
EXPOSE 8000 9464
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=5s --start-period=30s CMD ["millrace", "health"]
ENTRYPOINT ["tini", "--", "millrace"]
CMD ["api"]
COPY --from=build-api /opt/millrace /opt/millrace

FROM base AS worker
LABEL org.opencontainers.image.title="millrace-worker" \
      org.opencontainers.image.description="An engine of Millrace, on the CPU" \
      org.opencontainers.image.licenses="Apache-2.0"
USER 10001
WORKDIR /tmp
ENV PATH=/opt/millrace/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp \
    MILLRACE_HOST=0.0.0.0 MILLRACE_METRICS_HOST=0.0.0.0 MILLRACE_METRICS_PORT=9464
EXPOSE 8000 9464
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=5s --start-period=60s CMD ["millrace", "health", "--worker"]
ENTRYPOINT ["tini", "--", "millrace"]
CMD ["worker"]
COPY --from=build-worker /opt/millrace /opt/millrace

FROM base-cuda AS worker-cuda
LABEL org.opencontainers.image.title="millrace-worker-cuda" \
      org.opencontainers.image.description="An engine of Millrace, on NVIDIA GPUs" \
      org.opencontainers.image.licenses="Apache-2.0"
USER 10001
WORKDIR /tmp
# Triton compiles its kernels at the start, into a folder that may be written: mount a tmpfs there.
ENV PATH=/opt/millrace/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp TRITON_CACHE_DIR=/tmp/triton \
    MILLRACE_HOST=0.0.0.0 MILLRACE_METRICS_HOST=0.0.0.0 MILLRACE_METRICS_PORT=9464 MILLRACE_DEVICE=cuda \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
EXPOSE 8000 9464
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=5s --start-period=300s CMD ["millrace", "health", "--worker"]
ENTRYPOINT ["tini", "--", "millrace"]
CMD ["worker"]
COPY --from=build-worker-cuda /opt/millrace /opt/millrace
