//! The proxy between real sockets: clients that are written out byte by byte, and servers that do what a test says.

mod answers;
mod fixture;
mod hostile;
mod http2;
mod smuggling;
mod traces;
mod uploads;
mod websocket;
