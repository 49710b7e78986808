# An image with heliostat: for Kubernetes (deploy/kuberay), or for one container by itself. Two kinds, told apart by torch alone:
#
#   docker build -t heliostat:0.1.0-cpu .
#   docker build -t heliostat:0.1.0-cuda --build-arg TORCH=cu130 .    # some gigabytes more; the driver comes from the host
#   docker run --rm --shm-size 2g -v $PWD:/home/heliostat/work heliostat:0.1.0-cpu run examples/flights/flights.yaml
#   docker run --rm --shm-size 2g -v $PWD:/home/heliostat/work -p 127.0.0.1:8000:8000 -e HELIOSTAT_TOKEN=... \
#     heliostat:0.1.0-cpu serve flights@latest --host 0.0.0.0
#
# What is mounted has to be writable for user 1000. Versions are those of cluster.yaml and constraints.txt; a test compares them.
ARG PYTHON=3.12.11
ARG UV=0.13.6

FROM ghcr.io/astral-sh/uv:${UV} AS uv

FROM python:${PYTHON}-slim-bookworm AS build
ARG TORCH=cpu
COPY --from=uv /uv /usr/local/bin/uv
ENV UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 UV_PYTHON_DOWNLOADS=never
RUN uv venv --python /usr/local/bin/python /opt/heliostat
WORKDIR /source
# What it rests on is a layer of its own, which a change of heliostat's code leaves as it is.
COPY pyproject.toml constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --python /opt/heliostat/bin/python --torch-backend ${TORCH} -c constraints.txt -r pyproject.toml
COPY README.md LICENSE ./
COPY app app
COPY pipelines pipelines
COPY serve serve
COPY tune tune
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --python /opt/heliostat/bin/python --no-deps .

FROM python:${PYTHON}-slim-bookworm
# libgomp1: LightGBM's threads. wget: KubeRay asks with it, and with the bash and grep that are there, whether a pod is ready.
# tini: process 1 of a container by itself, which hands signals on and buries Ray's orphans.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 tini wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home heliostat \
    && install --directory --owner 1000 --group 1000 /home/heliostat/work
COPY --from=build /opt/heliostat /opt/heliostat
ENV PATH=/opt/heliostat/bin:$PATH PYTHONUNBUFFERED=1 NVIDIA_DRIVER_CAPABILITIES=compute,utility
# By number, so that Kubernetes can see that it is not root.
USER 1000:1000
WORKDIR /home/heliostat/work
EXPOSE 8000
# Only `serve` answers at a port, and is asked there; any other command is well while it runs. Kubernetes asks in its own ways.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ! grep -qxz serve /proc/1/cmdline || wget -q -O /dev/null http://127.0.0.1:8000/v2/health/ready
ENTRYPOINT ["tini", "--", "heliostat"]
CMD ["--help"]
