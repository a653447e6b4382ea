FROM python:3.12-slim

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1

WORKDIR /app

# The lock first: it changes seldom, and its layer is the big one. torch comes with CUDA; for a smaller image give
# --build-arg PIP_EXTRA_INDEX_URL= an index that has its CPU build.
ARG PIP_EXTRA_INDEX_URL=
COPY requirements.txt ./
RUN pip install --quiet -r requirements.txt

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
