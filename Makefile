# Every target sets itself up: uv is taken from the PATH, or installed into .uv/ where it is missing.
UV := $(shell command -v uv || echo .uv/bin/uv)
RUN := $(UV) run --frozen
export PYTHONWARNINGS = ignore
# glibc hands every large tensor back to the kernel at once and has its pages zeroed again for the next; keeping them is worth a tenth of a training
export MALLOC_MMAP_MAX_ = 0
export MALLOC_TRIM_THRESHOLD_ = 100000000000
.DEFAULT_GOAL := help
.PHONY: help repro verify results readme test test-all lab bench reference scan sbom clean environment data

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

.uv/bin/uv:
	python3 -m venv .uv && .uv/bin/pip install --quiet uv

environment: $(filter .uv/%,$(UV))
	@$(UV) sync --frozen --quiet --compile-bytecode  # or every process compiles PyTorch anew where Python may not write caches

data: environment
	@$(RUN) dvc pull --quiet data.dvc

repro: data  ## train, evaluate and compare all models, and say whether that reproduces the committed metrics; reruns only what changed
	$(RUN) dvc repro
	@$(RUN) spotter verify --no-fail

verify: environment  ## the verdict of repro alone; exit status 0 only if the committed metrics are reproduced
	@$(RUN) spotter verify

results: data  ## after repro: several seeds per model, unseen methods, originals alone, a learning curve, an ablation, computational costs; sixteen more trainings, resumable
	$(RUN) dvc repro --quiet prepare results/dvc.yaml:prepare
	$(RUN) dvc repro --allow-missing results/dvc.yaml  # a training whose tables are here is not done again because its checkpoint is elsewhere

# two processes of one thread each; a file's tests share its fixtures in one process
PYTEST = OMP_NUM_THREADS=1 $(RUN) pytest -n 2 --dist loadfile --no-loadscope-reorder
# a processor without AVX2 and AVX-512, as PyTorch, OpenCV, NumPy and MKL see it
OLD_PROCESSOR = ATEN_CPU_CAPABILITY=default OPENCV_CPU_DISABLE=AVX2,AVX512-SKX NPY_DISABLE_CPU_FEATURES="X86_V3 X86_V4" MKL_ENABLE_INSTRUCTIONS=SSE4_2

test: data  ## minutes: every library notebook, notebooks against package, tests
	OMP_NUM_THREADS=1 $(RUN) nbdev_test --skip_folder_re '^[_.]|^stages' --skip_file_re '^[_.]|^index|^datasheet' --n_workers 2
	$(PYTEST) -m "not slow"

test-all: data  ## what only a long run can show: several models, many trainings, pages on the files as they are, other instruction sets
	$(PYTEST) -m slow
	$(OLD_PROCESSOR) $(PYTEST) -m "not slow" tests/test_data.py tests/test_model.py tests/test_metrics.py

lab: data  ## JupyterLab on the notebooks
	$(RUN) jupyter lab --notebook-dir=. nbs/index.ipynb

bench: data  ## speeds as ratios, measured side by side
	$(RUN) dvc repro --quiet prepare
	$(RUN) python benchmarks/preparing.py
	$(RUN) python benchmarks/cluster.py
	$(RUN) python benchmarks/loading.py
	$(RUN) python benchmarks/training_step.py
	env -u MALLOC_MMAP_MAX_ -u MALLOC_TRIM_THRESHOLD_ $(RUN) python benchmarks/heatmaps.py   # as in a user's notebook
	env -u MALLOC_MMAP_MAX_ -u MALLOC_TRIM_THRESHOLD_ $(RUN) python benchmarks/inference.py  # as in a user's notebook

reference: environment  ## put the settings for real corpora (params/reference.yaml) into params.yaml
	$(RUN) python -c "from spotter.model.start_weights import apply_reference; print(*apply_reference(), sep='\n')"

readme: data  ## run the notebooks of README.md and DATASHEET.md on the files as they are, and make the pages from them
	$(RUN) jupyter nbconvert --log-level=ERROR --to notebook --execute --inplace nbs/index.ipynb nbs/datasheet.ipynb
	$(RUN) nbdev_clean
	$(RUN) jupyter nbconvert --log-level=ERROR --to markdown --TagRemovePreprocessor.enabled=True \
	  --TagRemovePreprocessor.remove_input_tags=hide_input --output-dir . --output README nbs/index.ipynb
	$(RUN) jupyter nbconvert --log-level=ERROR --to markdown --TagRemovePreprocessor.enabled=True \
	  --TagRemovePreprocessor.remove_input_tags=hide_input --output-dir . --output DATASHEET nbs/datasheet.ipynb

scan: environment  ## look for dangerous calls (bandit) and for known holes in what uv.lock names (pip-audit, where its database can be reached)
	$(RUN) bandit --quiet --recursive --configfile pyproject.toml spotter
	@$(UV) export --frozen --quiet --no-emit-project --format requirements.txt --output-file .scan.txt
	@trap 'rm -f .scan.txt .scan.out .scan.log' EXIT; code=0; \
	  $(RUN) pip-audit --disable-pip --require-hashes --progress-spinner off --requirement .scan.txt >.scan.out 2>.scan.log || code=$$?; \
	  if [ $$code != 0 ] && grep -qE 'ConnectionError|ServiceError|Max retries' .scan.log; then echo "pip-audit: skipped, its database cannot be reached"; \
	  else missed=$$(grep -c 'could not be audited' .scan.out || true); cat .scan.log; grep -v 'could not be audited' .scan.out; \
	    [ $$missed = 0 ] || echo "pip-audit: $$missed of $$(grep -cE '^[a-z0-9].*==' .scan.txt) packages were skipped, the package index here does not know them or their holes"; exit $$code; fi

sbom:  ## write sbom.json: all that uv.lock installs for a user, as CycloneDX, without network
	@$(UV) export --frozen --offline --quiet --no-dev --format cyclonedx1.5 --output-file sbom.json

clean:  ## remove what the stages made; data and the caches of DVC stay
	rm -rf faces faces_c40 checkpoints reports/html .resume .prepare
