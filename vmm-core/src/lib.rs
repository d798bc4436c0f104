//! The machine, and what starts and watches it: the libraries behind `bulkhead` and `bulkhead-vcpu`.

pub mod bus;
