# docker compose up --build (see compose.yaml)
# SuperLink and SuperNodes in one image: what the app needs; the app comes with each run.
# Kept minimal, because it was written where no Docker engine is and never built:
# tests/test_containers.py only runs the same commands without one.
FROM flwr/base:1.41.0-py3.11-ubuntu24.04

COPY requirements.txt .
RUN python -m pip install --no-cache-dir -r requirements.txt

# Everything that a container writes is in its home, so that one volume keeps it. Made by
# the image's own user, app (49999), for a new volume takes over the folder's owner.
RUN mkdir home
ENV HOME=/app/home
WORKDIR /app/home
