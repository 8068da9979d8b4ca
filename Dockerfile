# One image for every stage and for the service: `docker run IMAGE run training ...`, `docker run IMAGE serve`.
FROM python:3.11-slim AS build
RUN python -m venv /opt/venv
WORKDIR /src
COPY requirements.lock pyproject.toml README.md LICENSE ./
RUN /opt/venv/bin/pip install --no-cache-dir --quiet -c requirements.lock torch
COPY hm_reco hm_reco
COPY runner runner
COPY reports reports
RUN /opt/venv/bin/pip install --no-cache-dir --quiet -c requirements.lock .

FROM python:3.11-slim
# LightGBM's threads
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*
ARG GIT_SHA=dev
ENV PATH=/opt/venv/bin:$PATH GIT_SHA=$GIT_SHA HOME=/tmp HM_HOST=0.0.0.0 PYTHONDONTWRITEBYTECODE=1
LABEL org.opencontainers.image.title="hm-reco" org.opencontainers.image.revision=$GIT_SHA
WORKDIR /app
COPY --from=build /opt/venv /opt/venv
COPY settings.ini ./
COPY nbs nbs
USER 10001
EXPOSE 8080
HEALTHCHECK --interval=30s --timeout=3s --start-period=60s \
  CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/healthz')"]
ENTRYPOINT ["hm"]
CMD ["serve"]
