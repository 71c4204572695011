//! multifd-tracking
