//! multifd-sender
