# docker build -t fable . && docker run -it fable make demo
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /fable
COPY . .
RUN make .venv/installed run
CMD ["make", "demo"]
