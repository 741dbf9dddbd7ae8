# Two commands do all the set-up:  make serve   and   make test
PYTHON ?= python3
VENV   ?= .venv
HOST   ?= 127.0.0.1
PORT   ?= 8000
MODEL  ?=
ARGS   ?=
USERS  ?= 16
TIME   ?= 30s
TRACE  ?=
STORIES ?=
WIKITEXT ?=

MINUTES ?= 5
KILLS  ?=
SIZES  ?= S M L

RUN = $(VENV)/bin/

.PHONY: help serve test redis chaos bench bench-streams bench-commit bench-events bench-gpu bench-growth replay-cache load loadtest loadtest-sweep clients bench-perplexity bench-same-text bleu bench-attention bench-long-stream peers bench-peers fuzz clean

help:
	@echo "make serve   serve the bundled model on http://$(HOST):$(PORT)   (PORT=, MODEL=, ARGS= pass through)"
	@echo "make test    every check: ruff, mypy, pytest (without redis-server the fault tests are skipped, loudly)"
	@echo "make redis   install redis-server for the fault tests, where it is missing (Debian, Ubuntu; asks for root)"
	@echo "make chaos   random faults for MINUTES=5, or KILLS=1000 worker kills, every stream checked token by token"
	@echo "make bench   tokens/s of the bare engine against HTTP streaming, at 1, 8 and 32 streams"
	@echo "make bench-streams  a thousand streams of a toy engine over Redis: latency, CPU, memory of each process"
	@echo "make bench-commit   how long Redis takes for one step of 64 requests"
	@echo "make bench-events   events/s of the HTTP half alone, beside sse-starlette and a bare ASGI loop"
	@echo "make bench-gpu      the engine on a GPU, with nothing installed but torch, triton, transformers (PYTHON=python3)"
	@echo "make bench-growth   step time by batch, context and queue, the scheduler's share, a long prompt among streams"
	@echo "make replay-cache   a trace (TRACE=) through the prefix cache, beside a simulated LRU cache"
	@echo "make bench-perplexity  perplexity and speed of number formats on a text (ARGS=\"--model DIR --data FILE\")"
	@echo "make bench-same-text   how many of 1,000 requests get the same output alone and among others"
	@echo "make bleu    how good a served encoder-decoder translates (ARGS=\"--url URL --source FILE --reference FILE\")"
	@echo "make bench-attention    kinds of layers side by side: trains one network of each (STORIES= WIKITEXT=)"
	@echo "make bench-long-stream  65,536 tokens over HTTP on the bundled sizes, for each kind of layer: time and memory"
	@echo "make peers   what bench-peers measures against: llama-server, OpenVINO GenAI, random models (SIZES=\"S M L\")"
	@echo "make bench-peers    served and bare, beside llama-server, OpenVINO GenAI and transformers: tokens/s and bars"
	@echo "make load    Locust users against a running server (USERS=16 TIME=30s, ARGS=\"Generate --rate 4\", ...)"
	@echo "make loadtest       start the stack, load it, write build/loadtest/report.html, exit by the SLO (ARGS=\"--workers 1\")"
	@echo "make loadtest-sweep the same rate by rate: where the knee is, and the capacity within the SLO"
	@echo "make fuzz    50,000 requests from /openapi.json, spoilt HTTP and silent sockets against a server of its own"
	@echo "make clients other people's clients, each in its own environment, against a server: a table of what passed"
	@echo "make clean   remove the virtual environment and caches"

$(VENV)/serve.stamp: pyproject.toml constraints.txt deploy/setup.sh
	PYTHON="$(PYTHON)" sh deploy/setup.sh "$(VENV)"
	@touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt deploy/setup.sh
	PYTHON="$(PYTHON)" sh deploy/setup.sh "$(VENV)" dev
	@touch $(VENV)/serve.stamp $@

serve: $(VENV)/serve.stamp
	@exec $(RUN)millrace serve --host $(HOST) --port $(PORT) $(if $(MODEL),--model "$(MODEL)") $(ARGS)

test: $(VENV)/dev.stamp
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)mypy
	$(RUN)pytest -n 2 --dist loadfile

redis:
	sh deploy/redis.sh

chaos: $(VENV)/dev.stamp
	$(RUN)python -m loadtests.chaos --minutes $(MINUTES) $(if $(KILLS),--kills $(KILLS) --only kills) $(ARGS)

bench: $(VENV)/dev.stamp
	$(RUN)python -m loadtests.bench $(ARGS)

bench-streams: $(VENV)/dev.stamp
	$(RUN)python -m loadtests.streams $(ARGS)

bench-commit: $(VENV)/dev.stamp
	$(RUN)python -m loadtests.commit $(ARGS)

bench-events: $(VENV)/dev.stamp
	$(RUN)python -m loadtests.bench_events $(ARGS)

# With the Python that has torch for CUDA, triton, transformers and safetensors: PYTHON=
bench-gpu:
	PYTHONPATH=. $(PYTHON) -m loadtests.bench_gpu $(ARGS)

bench-growth: $(VENV)/dev.stamp
	$(RUN)python -m loadtests.bench_growth --json build/growth.json --plot build/growth.png $(ARGS)

replay-cache: $(VENV)/dev.stamp
	$(RUN)python -m loadtests.replay_cache "$(TRACE)" $(ARGS)

bench-perplexity: $(VENV)/dev.stamp
	$(RUN)python -m loadtests.perplexity $(ARGS)

bench-same-text: $(VENV)/dev.stamp
	$(RUN)python -m loadtests.same_text $(ARGS)

bleu: $(VENV)/dev.stamp
	$(RUN)python -m loadtests.bleu $(ARGS)

bench-attention: $(VENV)/dev.stamp
	$(RUN)python -m loadtests.bench_attention $(if $(STORIES),--stories "$(STORIES)") \
	  $(if $(WIKITEXT),--wikitext "$(WIKITEXT)") $(ARGS)

bench-long-stream: $(VENV)/dev.stamp
	$(RUN)python -m loadtests.long_stream $(ARGS)

# Some 12 GB in .peers; LLAMA_SERVER=/path takes a llama-server instead of building one.
peers: $(VENV)/dev.stamp
	PYTHON="$(PYTHON)" sh deploy/peers.sh "$(VENV)" $(SIZES)

bench-peers: $(VENV)/dev.stamp
	$(RUN)python -m loadtests.bench_peers $(ARGS)

load: $(VENV)/dev.stamp
	$(RUN)locust -f loadtests/locustfile.py --headless --host http://$(HOST):$(PORT) -u $(USERS) -r $(USERS) -t $(TIME) $(ARGS)

loadtest: $(VENV)/dev.stamp
	$(RUN)python -m loadtests.load run $(ARGS)

loadtest-sweep: $(VENV)/dev.stamp
	$(RUN)python -m loadtests.load sweep $(ARGS)

fuzz: $(VENV)/dev.stamp
	$(RUN)python -W ignore -m loadtests.fuzz $(ARGS)

# Installs gigabytes into .clients; ARGS picks some of them by name.
clients: $(VENV)/dev.stamp
	$(RUN)python -m loadtests.clients $(ARGS)

clean:
	rm -rf "$(VENV)" .clients .peers .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
