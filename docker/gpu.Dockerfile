# svdserve on NVIDIA GPUs: vLLM's own image and one wheel. From the repository's root:
#   docker buildx build -f docker/gpu.Dockerfile -t svdserve:gpu .
# README.md beside this file tells how to pin the base by digest and to write an SBOM.
ARG BASE=vllm/vllm-openai:v0.32.0

FROM ${BASE} AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY compression compression
COPY kernels kernels
COPY server server
# A private index goes into the secret `pip.conf`, which leaves no trace.
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    python3 -m pip wheel --quiet --no-cache-dir --no-deps --wheel-dir /wheel .

FROM ${BASE}
LABEL org.opencontainers.image.title="svdserve" \
      org.opencontainers.image.description="Models made smaller with SVD, served by vLLM on GPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="docker.io/vllm/vllm-openai:v0.32.0"
# For more than one machine, which vLLM's own image has no Ray for: ray[cgraph]==2.60.0
ARG PACKAGES=
# The constraints keep every package that the base brings at the base's version.
RUN --mount=type=bind,from=build,source=/wheel,target=/wheel \
    --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    python3 -m pip list --format=freeze > /tmp/base.txt \
 && python3 -m pip install --quiet --no-cache-dir --break-system-packages --constraint /tmp/base.txt \
      /wheel/*.whl ${PACKAGES} \
 && rm /tmp/base.txt \
 && useradd --uid 10001 --user-group --no-create-home --home-dir /cache svdserve \
 && install --directory --owner=svdserve --group=svdserve /cache /models
ENV HOME=/cache \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    VLLM_NO_USAGE_STATS=1 \
    DO_NOT_TRACK=1
USER 10001:10001
WORKDIR /models
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m --retries=3 \
  CMD ["python3", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["svdserve"]
CMD ["serve", "/models/small", "--host", "0.0.0.0"]
