//! How fast the store is; prints and asserts nothing. See the numbers with
//! `cargo test --release --features sqlite speed -- --ignored --nocapture --test-threads=1`.
