//! multifd-wire
