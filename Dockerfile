# syntax=docker/dockerfile:1
# Two images from one file: `api` (no torch) and `worker` (CUDA). Both run as an ordinary user.

FROM python:3.11.16-slim@sha256:9c900dea9e8fb7e16277c179b555cc72d29a352dbc33cff48ad5a0412fd5bfc7 AS base
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 DPO_HOME=/var/lib/dpo
RUN useradd --create-home --uid 10001 dpo && install -d -o dpo -g dpo /var/lib/dpo
WORKDIR /opt/dpo
COPY pyproject.toml constraints.txt ./

# Dependencies come before the sources, so that a change of the sources installs them from the layer below.
FROM base AS api-dependencies
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
    > requirements.txt && pip install --constraint constraints.txt --requirement requirements.txt

FROM api-dependencies AS api
COPY README.md LICENSE ./
COPY app app
COPY worker worker
COPY migrations migrations
COPY demo demo
RUN pip install --constraint constraints.txt .
USER dpo
VOLUME /var/lib/dpo
EXPOSE 8000
CMD ["dpo", "api"]

# torch's own wheel brings the CUDA libraries; the host brings the driver. The attention kernels are compiled when a
# training first needs them, for which Triton wants a C compiler.
FROM api-dependencies AS worker-dependencies
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN pip install --constraint constraints.txt torch==2.13.0
# `worker,cluster` adds Ray, for trainings over several machines.
ARG EXTRAS=worker
RUN python -c "import sys, tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    [print(*p['optional-dependencies'][extra], sep='\n') for extra in sys.argv[1].split(',')]" "$EXTRAS" > requirements.txt \
    && pip install --constraint constraints.txt --requirement requirements.txt

FROM worker-dependencies AS worker
ARG EXTRAS=worker
COPY README.md LICENSE ./
COPY app app
COPY worker worker
COPY migrations migrations
COPY demo demo
RUN pip install --constraint constraints.txt ".[$EXTRAS]" && install -d -o dpo -g dpo /var/cache/hub
USER dpo
VOLUME /var/lib/dpo
CMD ["dpo", "worker", "--lane", "gpu"]
