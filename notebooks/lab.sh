#!/bin/sh
# sh notebooks/lab.sh: opens the notebooks of an unpacked bundle in JupyterLab; options go to it. The first call installs
# it into .venv, which sees the system's packages too: JetPack's TensorRT is one of them. PYTHON names another Python.
# What opens are copies in lab/: build_here.py wants the bundle's own files as they were packed.
set -e
cd "$(dirname "$0")/.."
if [ ! -f .venv/installed ]; then
  ${PYTHON:-python3} -m venv --system-site-packages .venv
  .venv/bin/python -m pip install --quiet --upgrade pip
  .venv/bin/python -m pip install --quiet -r notebooks/requirements.txt
  touch .venv/installed
fi
mkdir -p lab
cp -n notebooks/*.ipynb lab/
[ "$(id -u)" != 0 ] || set -- --allow-root "$@"
PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} exec .venv/bin/python -m jupyterlab --ServerApp.root_dir="$PWD" \
  --LabApp.default_url=/lab/tree/lab/00_tour.ipynb "$@"
