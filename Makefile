# brooklet: `make run` and `make test` are all a newcomer needs.
.PHONY: run minimal setup test smoke siege doctor doctor-test clients redis-test redis-load bench model model-broken fuzz power build fmt clean need-cargo

# Builds, then serves on http://127.0.0.1:3000 until Ctrl-C.
run: need-cargo
	@cargo build --release --quiet && exec target/release/brooklet

# The server in one file, src/minimal.rs, on the same address, or at ADDRESS=127.0.0.1:8080.
minimal: need-cargo
	@cargo build --release --quiet --bin brooklet-minimal && exec target/release/brooklet-minimal $(ADDRESS)

# Installs what the tests use beside Rust (Debian). What is missing, they leave out, and say so.
setup:
	sh tests/setup.sh

# Formatting, lints, all tests. Then, two at a time, since much of it waits: some orders of threads, the consoles of the README, a
# short siege, the doctor; and what takes all the processor that it can get: Redis, other people's clients, proxies, a browser.
# What a part needs and is not there leaves that part out, and says so.
test: need-cargo
	cargo fmt --check
	cargo clippy --all-targets -- --deny warnings
	cargo clippy --lib --no-default-features -- --deny warnings
	cargo rustc --lib --profile check -- --cfg fuzzing
	$(TEST_MANY) cargo test
	sh tests/model/broken.sh --check
	$(MAKE) $(TWO) MODEL_SECONDS=3 SIEGE=short model smoke siege doctor-test
	$(MAKE) $(TWO) redis-test clients

# Some tests open a thousand connections at once; most wait more than they work, so four run for each core.
TEST_MANY = ulimit -n $$(ulimit -Hn); RUST_TEST_THREADS=$$((4 * $$(getconf _NPROCESSORS_ONLN)))
TWO = --no-print-directory --jobs=2 --output-sync

# Every console block of the README, word for word, against a server on a free port.
smoke: build
	sh tests/smoke.sh

# A thousand slow connections of each kind, a minute each, and what they mean for others: ten minutes, with slowhttptest.
siege: build
	ulimit -n $$(ulimit -Hn); sh tests/siege.sh

# What does a proxy do to the streams at URL=http://host/prefix? Its other settings: make doctor.
doctor:
	@sh tests/doctor.sh

# The doctor behind an nginx that is wrong in every way it knows, and one that is right.
doctor-test: build
	sh tests/doctor-test.sh

# What people really use: clients in other languages, nginx and Caddy, Chromium. Installs their packages into target/clients.
clients: build
	sh tests/clients/run.sh

# Three servers that share a real Redis, which is hurt in every way we know, and sixty million deliveries, calm and while servers
# or Redis are killed: two minutes and the build, which is optimized. With valkey-server: make redis-test REDIS_SERVER=valkey-server
redis-test: need-cargo
	cargo clippy --all-targets --features redis -- --deny warnings
	$(TEST_MANY) cargo test --release --features redis --test redis
	ulimit -n $$(ulimit -Hn); cargo test --release --features redis --test redis -- --ignored --nocapture --test-threads 1 sixty_million

# What it costs to go through Redis, as tables: a minute, with redis-server.
redis-load: need-cargo
	ulimit -n $$(ulimit -Hn); cargo test --release --features redis --test redis -- --ignored --nocapture what_it_costs

# What a delivery costs beside what the kernel charges for it, and in the server in one file: tables and a plot, in three minutes.
bench: need-cargo
	ulimit -n $$(ulimit -Hn); cargo bench --bench bench

# Who owns a socket, and who writes the journal, in many orders of the threads: a minute for each model, or
# SCHEDULES=5000 of each. What fails says how to repeat it: make model MODEL='turning live' SEED=17.
model: need-cargo
	MODEL_SECONDS=$(or $(MODEL_SECONDS),$(if $(SCHEDULES),,60)) sh tests/model/run.sh

# Would the models find a fault? Each of tests/model/broken makes one, and must be found within a minute.
model-broken: need-cargo
	sh tests/model/broken.sh

# Fuzzes all that reads bytes from outside: six targets, a minute each (SECONDS_EACH=60), with a C++ compiler.
fuzz: need-cargo
	sh tests/fuzz/run.sh

# Loses power again and again: an hour (SECONDS=3600) of trials from SEED=1 on. SECONDS=0 SEED=17 repeats one of them.
power: need-cargo
	POWER_SECONDS=$(or $(SECONDS),3600) POWER_SEED=$(or $(SEED),1) cargo test --test tests -- --ignored --exact --nocapture power::power_is_lost_until_time_is_over

# The release build, in target/release/brooklet.
build: need-cargo
	cargo build --release

# Formats the sources.
fmt: need-cargo
	cargo fmt

# Removes what was built.
clean: need-cargo
	cargo clean

need-cargo:
	@command -v cargo >/dev/null || { echo 'cargo is missing: install Rust 1.89 or newer from https://rustup.rs' >&2; exit 1; }
