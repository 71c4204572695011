//! multifd-guest
