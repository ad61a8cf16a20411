# A site's SuperNode: the only process of a site that talks to the outside. Knows no torch.
ARG BASE_IMAGE=python:3.12-slim@sha256:57cd7c3a7a273101a6485ba99423ee568157882804b1124b4dd04266317710de

# uv, by hash. It is mounted where it is needed and is in no layer of the image.
FROM ${BASE_IMAGE} AS tools
COPY requirements/tools.txt /requirements/
RUN python3 -m venv /opt/tools \
    && /opt/tools/bin/pip install --no-cache-dir --disable-pip-version-check --require-hashes -r /requirements/tools.txt

# The project as a wheel, built with the locked setuptools.
FROM tools AS wheel
WORKDIR /src
COPY requirements/dev.txt requirements/
COPY pyproject.toml README.md vlafleet.py ./
COPY app app/
COPY certs certs/
COPY superlink superlink/
COPY supernode supernode/
RUN /opt/tools/bin/uv build --no-cache --quiet --wheel --out-dir /wheel \
    --build-constraints requirements/dev.txt --require-hashes

FROM ${BASE_IMAGE}
# Bytecode is compiled here because the containers run read-only: otherwise every process start, health probes
# included, would compile the standard library and the packages again.
RUN --mount=type=bind,from=tools,source=/opt/tools,target=/opt/tools \
    --mount=type=bind,source=requirements/base.txt,target=/requirements/base.txt \
    /opt/tools/bin/uv venv --no-cache --quiet --python python3 /opt/vlafleet \
    && /opt/tools/bin/uv pip install --no-cache --quiet --python /opt/vlafleet/bin/python --compile-bytecode \
        --require-hashes -r /requirements/base.txt \
    && python3 -m compileall -q -x 'site-packages|lib2to3' /usr/local/lib/python3.12

# A number of its own, so that a file mode means the same on the host.
RUN useradd --uid 10001 --user-group --create-home --shell /usr/sbin/nologin vlafleet \
    && install -d -o vlafleet -g vlafleet -m 0700 /identity

RUN --mount=type=bind,from=tools,source=/opt/tools,target=/opt/tools \
    --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    /opt/tools/bin/uv pip install --no-cache --quiet --python /opt/vlafleet/bin/python --compile-bytecode \
        --offline --no-deps /wheel/*.whl

ENV PATH=/opt/vlafleet/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    FLWR_HOME=/home/vlafleet/.flwr \
    FLWR_TELEMETRY_ENABLED=0 \
    FLWR_DISABLE_UPDATE_CHECK=1 \
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
USER 10001:10001
WORKDIR /home/vlafleet
EXPOSE 9094 9095
ENTRYPOINT ["vlafleet"]
CMD ["supernode", "--help"]
