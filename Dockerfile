# One image that serves the bundled model on port 8000, or any folder mounted and named:
#   docker build -t millrace .
#   docker run --rm -p 127.0.0.1:8000:8000 millrace --insecure-no-auth
#   docker run --rm -p 127.0.0.1:8000:8000 -v /path/to/model:/model:ro millrace --insecure-no-auth --model /model
# For others than this machine, with keys (`millrace keys add NAME --file keys.json` makes them; user 10001 must read it):
#   docker run --rm -p 8000:8000 -v ./keys.json:/keys.json:ro millrace --api-keys-file /keys.json
# For an NVIDIA GPU, build with --build-arg TORCH_INDEX_URL= (the ordinary index carries the CUDA build).
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim
FROM ${PYTHON_IMAGE} AS build
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY deploy/setup.sh deploy/setup.sh
COPY model model
COPY service service
RUN TORCH_INDEX_URL="${TORCH_INDEX_URL}" EDITABLE= sh deploy/setup.sh /opt/millrace

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="millrace" \
      org.opencontainers.image.description="Model serving with streaming generation" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin millrace
COPY --from=build /opt/millrace /opt/millrace
USER 10001
ENV PATH=/opt/millrace/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/ready', timeout=2)"]
ENTRYPOINT ["millrace", "serve", "--host", "0.0.0.0", "--port", "8000"]
