# Everything is installed into .venv, by version and hash, from the locks under requirements/. Only a missing C++
# compiler, cmake or Python's venv module come from the system's packages: for root by apt-get, else you are told.
PYTHON := $(shell for p in python3 python3.12 python3.11 python3.10; do \
  $$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && command -v $$p && break; done)
BIN := .venv/bin
UV := $(BIN)/uv
export TF_CPP_MIN_LOG_LEVEL := 3
export PYTHONUNBUFFERED := 1
# Containers often set it. Then each process compiles what it imports anew: with TensorFlow 11 seconds of 18.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help run plugin check-aarch64 test test-gpu lint format book notebooks lab install install-dev locks clean

help:
	@echo "make run      the shipped detector through every stage, to a picture and report.html"
	@echo "make plugin   compile the C++ library, with CUDA and the TensorRT plugin where there is a GPU; ARCH=all: for every GPU"
	@echo "make plugin TARGET=jetson-orin  the same, compiled here for that board (also jetson-xavier, jetson-thor)"
	@echo "make check-aarch64  slow: the bundle and that plugin in an emulated arm64 system -> results/aarch64.cpu.json"
	@echo "make test     all tests but the notebooks, which `make book` runs (those of the corpus are skipped if it is absent)"
	@echo "make test-gpu the CUDA kernels against the reference, by GPU_PYTHON (python3), which needs PyTorch"
	@echo "make lint     ruff, mypy, codespell"
	@echo "make book     run the notebooks on this CPU as a test, and build the site, strictly, into _build/html"
	@echo "make lab      open the tour in JupyterLab"
	@echo "make notebooks  record the notebooks' outputs anew"
	@echo "make install  only set up .venv;  make clean  remove it, plugins/build, _build and out"
	@echo "make locks    resolve requirements/*.in into *.lock; UPGRADE=--upgrade takes the newest versions"

run: install
	$(BIN)/odtrt run models/parts --output out/parts

# CUDA is compiled for the GPUs that are here, and not at all where there is none: nine architectures take minutes.
# ARCH=all takes all of them, ARCH="87 90" these two. With TARGET they are compiled for a board, on this machine.
ARCH := here
TARGET :=
ifneq ($(TARGET),)
plugin: $(UV)
	@command -v cmake >/dev/null || ./scripts/install_compiler.sh
	@TENSORRT_INCLUDE_DIR="$(TENSORRT_INCLUDE_DIR)" $(BIN)/python scripts/cross_compile.py "$(TARGET)"
else
plugin:
	@{ command -v cmake && command -v c++; } >/dev/null || ./scripts/install_compiler.sh
	@architectures="$(ARCH)"; \
	[ "$$architectures" != here ] || architectures=$$($(or $(PYTHON),python3) scripts/gpu_architectures.py) || exit 1; \
	case "$$architectures" in \
	  "") echo "no NVIDIA GPU here: without CUDA (make plugin ARCH=all compiles for every GPU)"; \
	    rm -f plugins/build/libodtrt_tensorrt.so plugins/build/libodtrt_engine*.so; set -- -DODTRT_CUDA=OFF ;; \
	  all) echo "compiling CUDA for every architecture: about half a minute each"; set -- -DODTRT_CUDA=ON -UCMAKE_CUDA_ARCHITECTURES ;; \
	  *) set -- -DODTRT_CUDA=ON "-DCMAKE_CUDA_ARCHITECTURES=$$(echo $$architectures | tr ' ' ';')" ;; \
	esac; \
	cmake -S plugins -B plugins/build --log-level=NOTICE "$$@" >/dev/null
	@cmake --build plugins/build --parallel $$(nproc) >plugins/build/log 2>&1 || { cat plugins/build/log; exit 1; }
	@ls plugins/build/libodtrt*.so
endif

# The root file system and the wheels are kept in .cache/aarch64. The recorded run also needs TENSORRT_INCLUDE_DIR, the
# headers of TensorRT 10 or 11.
check-aarch64: install-dev plugin
	@test -f out/parts/heads.onnx || $(MAKE) run
	$(BIN)/odtrt fuse out/parts
	$(BIN)/python benchmarks/aarch64.py

test: install-dev plugin
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not notebook"

GPU_PYTHON := python3
test-gpu: plugin
	$(GPU_PYTHON) tests/test_gpu.py

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

format: install-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

book: install-dev plugin
	$(BIN)/python scripts/record_notebooks.py check
	$(BIN)/python scripts/book_tables.py check
	$(BIN)/python -m pytest -n 2 -m notebook tests/test_notebooks.py
	$(BIN)/jupyter-book build . -W -n --keep-going
	$(BIN)/python -m pytest tests/test_book.py
	$(BIN)/linkchecker --no-status --no-warnings _build/html/index.html

notebooks: install-dev plugin
	$(BIN)/python scripts/record_notebooks.py record
	$(BIN)/python scripts/book_tables.py

# The server's root is the repository, so that links from a notebook to a page of book/ work. overrides.json there shows
# pages, not their source. LAB takes options of JupyterLab: LAB=--ip=0.0.0.0 where it is reached from outside a container.
LAB :=
lab: install-dev plugin
	$(BIN)/jupyter lab --ServerApp.root_dir=$(CURDIR) --LabApp.default_url=/lab/tree/notebooks/00_tour.ipynb \
	  --LabApp.app_settings_dir=$(CURDIR)/scripts/jupyterlab \
	  $$([ "$$(id -u)" != 0 ] || echo --allow-root) \
	  $$([ -n "$$DISPLAY$$WAYLAND_DISPLAY" ] || [ "$$(uname)" = Darwin ] || echo --no-browser) $(LAB)

install: .venv/.run
install-dev: .venv/.dev

$(UV): requirements/uv.lock
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10, 3.11 or 3.12 found (TensorFlow 2.20 needs one): install python3.11"; exit 1; }
	@$(PYTHON) -c "import ensurepip" 2>/dev/null || ./scripts/install_venv_module.sh $(PYTHON)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.lock
	@touch $@

# Source packages are built with the setuptools that run.lock has just installed, not with one fetched for them.
INSTALL := $(UV) pip install --quiet --python $(BIN)/python
.venv/.run: $(UV) requirements/run.lock requirements/odapi.lock pyproject.toml
	$(INSTALL) --require-hashes -r requirements/run.lock
	$(INSTALL) --require-hashes --no-deps --no-build-isolation -r requirements/odapi.lock
	$(INSTALL) --no-deps --no-build-isolation -e .
	$(BIN)/python -m odtrt_lib.export.odapi
	@touch $@

.venv/.dev: .venv/.run requirements/dev.lock
	$(INSTALL) --require-hashes -r requirements/dev.lock
	@touch $@

# dev.lock is resolved first, with all of run.in in it; run.lock may only choose from it, so the two cannot drift.
UPGRADE :=
COMPILE := ../$(UV) pip compile --quiet --universal --python-version 3.10 --generate-hashes --no-header \
  --annotation-style line $(UPGRADE)
locks: $(UV)
	cd requirements && $(COMPILE) dev.in -o dev.lock
	cd requirements && $(COMPILE) -c dev.lock run.in -o run.lock
	cd requirements && $(COMPILE) --no-deps odapi.in -o odapi.lock
	cd requirements && $(COMPILE) uv.in -o uv.lock
	cd requirements && for name in cross aarch64; do $(subst --universal --python-version 3.10,--python-version 3.11 \
	  --python-platform aarch64-manylinux_2_36,$(COMPILE)) --no-deps -c dev.lock $$name.in -o $$name.lock || exit 1; done

clean:
	rm -rf .venv _build out plugins/build plugins/build-jetson-*
