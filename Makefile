# brooklet: `make run` and `make test` are all a newcomer needs.
.PHONY: run test smoke bench build fmt clean need-cargo

# Builds, then serves on http://127.0.0.1:3000 until Ctrl-C.
run: need-cargo
	@cargo build --release --quiet && exec target/release/brooklet

# Formatting, lints, all tests, and the README's own curl lines. Some tests open a thousand connections at once.
test: need-cargo
	cargo fmt --check
	cargo clippy --all-targets -- --deny warnings
	ulimit -n $$(ulimit -Hn); cargo test
	$(MAKE) --no-print-directory smoke

# Every command of the README, word for word, against a server on a free port.
smoke: build
	sh tests/smoke.sh

# What a delivery costs beside what the kernel charges for it: a table and a plot, in two minutes.
bench: need-cargo
	ulimit -n $$(ulimit -Hn); cargo bench --bench bench

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
