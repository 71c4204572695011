//! multifd-tests
