FROM python:3.12-slim

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1

WORKDIR /app

# The lock first: it changes seldom, and its layer is the big one. The extra index has torch without CUDA;
# build with --build-arg TORCH_INDEX=https://pypi.org/simple for one with it.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY requirements.txt ./
RUN pip install --quiet --extra-index-url "$TORCH_INDEX" -r requirements.txt

COPY pyproject.toml README.md LICENSE ./
COPY pipeline pipeline
COPY publishers publishers
COPY subscribers subscribers
COPY dashboards dashboards
COPY Procfile ./
RUN pip install --quiet --no-deps --no-build-isolation -e . \
    && useradd --create-home --uid 1000 pipeline \
    && mkdir .pipeline && chown pipeline .pipeline

USER pipeline
EXPOSE 8000 8050
CMD ["pipeline", "up"]
