# The trainer without or with a GPU. For a CPU:
#   docker build -t dllm-sd .
# For CUDA, on any image with Python 3.11 or newer:
#   docker build -t dllm-sd:cuda --build-arg BASE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime --build-arg EXTRAS=[quant,serve] .
# Then, with runs and downloaded models kept outside, in folders that user 1000 may write:
#   docker run --rm --gpus all -v ./runs:/home/trainer/runs -v ./models:/home/trainer/.cache/huggingface dllm-sd:cuda train quickstart
ARG BASE=python:3.11-slim
FROM ${BASE}
ARG EXTRAS=[serve]

WORKDIR /opt/dllm-sd
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY configs configs
COPY dllm_sd dllm_sd
RUN pip install --no-cache-dir ".${EXTRAS}" -c constraints.txt \
    && useradd --create-home --uid 1000 trainer

USER 1000
WORKDIR /home/trainer
ENTRYPOINT ["dllm-sd"]
CMD ["--help"]
