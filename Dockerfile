# One image for every role: `penstock ingress`, `penstock worker`, `penstock ledger`.
FROM python:3.11-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/penstock
# First what changes seldom, so that a change of the code doesn't fetch it anew.
COPY requirements/runtime.lock /src/requirements/runtime.lock
RUN /opt/penstock/bin/pip install --no-deps --require-hashes --only-binary :all: -r /src/requirements/runtime.lock
COPY pyproject.toml README.md LICENSE penstock.py /src/
COPY schemas /src/schemas
COPY bus /src/bus
COPY ingress /src/ingress
COPY workers /src/workers
COPY ledger /src/ledger
RUN /opt/penstock/bin/pip install --no-deps --no-build-isolation /src

FROM python:3.11-slim
RUN useradd --system --uid 10001 --no-create-home penstock \
    && install -d -m 700 -o penstock /var/lib/penstock
COPY --from=build /opt/penstock /opt/penstock
ENV PATH=/opt/penstock/bin:$PATH PENSTOCK_HOME=/var/lib/penstock PYTHONUNBUFFERED=1
USER 10001
EXPOSE 8000
ENTRYPOINT ["penstock"]
CMD ["--help"]
