# One image in four targets:
#   stage    runs any stage:   docker run IMAGE run training -p evaluation_weeks=4
#   api      the REST service: docker run -p 8080:8080 -e HM_LAKE=s3://bucket/lake IMAGE
#   lab      JupyterLab on the notebooks
#   cluster  any stage, on the head and workers of a Ray cluster
# Non-root; works with a read-only root file system and a writable /tmp (--read-only --tmpfs /tmp).
FROM docker.io/library/python:3.11-slim AS base
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
RUN useradd --uid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin hm

# The REST service's dependencies, in locked versions; without debug symbols, the libraries' tests,
# and botocore's data on services other than S3 and STS.
FROM base AS api-deps
WORKDIR /src
# hadolint ignore=DL3008
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends binutils libgomp1 \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv --without-pip /opt/venv
ENV PIP_PYTHON=/opt/venv/bin/python PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY requirements.lock pyproject.toml README.md LICENSE settings.ini ./
COPY hm_reco hm_reco
COPY runner runner
COPY reports reports
RUN pip install -c requirements.lock . \
 && find /opt/venv/lib -name '*.so' ! -path '*.libs/*' -exec strip --strip-unneeded {} + \
 && find /opt/venv/lib -type d -name tests -prune -exec rm -rf {} + \
 && find /opt/venv/lib/python3*/site-packages/botocore/data -mindepth 1 -maxdepth 1 -type d \
      ! -name 's3*' ! -name 'sts' ! -name 'sso*' -exec rm -rf {} +

# Of scipy, only LightGBM's sparse matrices are used: removing the rest saves 60 MB.
FROM api-deps AS slim
RUN for part in stats optimize spatial io signal interpolate integrate ndimage cluster odr datasets; \
    do rm -rf "/opt/venv/lib/python3.11/site-packages/scipy/$part"; done \
 && python -c "import hm_reco.stages.inference, runner.cli"

# The further dependencies of stages. torch is installed first, as the CPU build: PyPI's has CUDA.
FROM api-deps AS stage-deps
# an index in a requirements file is added to those of pip's configuration and does not replace them
RUN printf '%s\n' '--extra-index-url https://download.pytorch.org/whl/cpu' torch > torch.txt \
 && pip install --retries 1 -c requirements.lock -r torch.txt \
 && python -c "import torch; assert torch.version.cuda is None, 'a CUDA build of torch'" \
 && python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['stages'], sep='\n')" > stages.txt \
 && pip install -c requirements.lock -r stages.txt \
 && rm -rf /opt/venv/lib/python3*/site-packages/torch/include \
      /opt/venv/lib/python3*/site-packages/torch/test

# Run all stages and some requests once: numba's compiled code is cached next to the library, and
# the build fails if a dependency is missing.
FROM stage-deps AS warm
COPY nbs/stages nbs/stages
RUN python -c "from hm_reco.api.warm_up import main; main()"

FROM stage-deps AS cluster-deps
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['cluster'], sep='\n')" > cluster.txt \
 && pip install -c requirements.lock -r cluster.txt

FROM stage-deps AS lab-deps
RUN pip install -c requirements.lock jupyterlab nbdime

FROM base AS runtime
ARG GIT_SHA=unknown
ARG VERSION=unknown
LABEL org.opencontainers.image.title="hm-reco" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.revision="$GIT_SHA" \
      org.opencontainers.image.version="$VERSION"
ENV GIT_SHA=$GIT_SHA HM_VERSION=$VERSION HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib \
    PYTHONDONTWRITEBYTECODE=1 HM_ENV=prod HM_HOST=0.0.0.0 HM_PORT=8080
# hadolint ignore=DL3008
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends libgomp1 \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/*
WORKDIR /app
COPY settings.ini requirements.lock ./
COPY deploy/entrypoint.sh /usr/local/bin/entrypoint

FROM runtime AS lab
COPY --from=lab-deps /opt/venv /opt/venv
COPY nbs nbs
USER 10001
EXPOSE 8888
ENTRYPOINT ["entrypoint"]
CMD ["jupyter", "lab", "--ip=0.0.0.0", "--no-browser", "--notebook-dir=nbs"]

# KubeRay's health probes need wget
FROM runtime AS cluster
# hadolint ignore=DL3008
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends wget \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/*
COPY --from=cluster-deps /opt/venv /opt/venv
COPY --from=warm /opt/venv/lib/python3.11/site-packages/hm_reco/__pycache__ /opt/venv/lib/python3.11/site-packages/hm_reco/__pycache__
COPY nbs/stages nbs/stages
USER 10001
ENTRYPOINT ["entrypoint"]
CMD ["--help"]

FROM runtime AS stage
COPY --from=warm /opt/venv /opt/venv
COPY nbs/stages nbs/stages
USER 10001
ENTRYPOINT ["entrypoint"]
CMD ["--help"]

FROM runtime AS api
COPY --from=slim /opt/venv /opt/venv
COPY --from=warm /opt/venv/lib/python3.11/site-packages/hm_reco/__pycache__ /opt/venv/lib/python3.11/site-packages/hm_reco/__pycache__
USER 10001
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
  CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['HM_PORT'] + '/healthz', timeout=2)"]
ENTRYPOINT ["entrypoint"]
CMD ["serve"]
