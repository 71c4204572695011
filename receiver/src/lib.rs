//! multifd-receiver
