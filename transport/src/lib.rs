//! multifd-transport
