//! HTTP/1.1 requests, each on a connection of its own, and bare websockets.

use std::net::SocketAddr;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1;
use hyper::{HeaderMap, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

/// Sends a request and reads the whole answer.
///
/// # Errors
/// What went wrong, in words.
pub async fn ask(to: SocketAddr, request: Request<Full<Bytes>>) -> Result<(StatusCode, Bytes), String> {
    ask_over(TcpStream::connect(to).await.map_err(|e| e.to_string())?, request).await
}

/// The same over an existing connection.
///
/// # Errors
/// What went wrong, in words.
pub async fn ask_over(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    request: Request<Full<Bytes>>,
) -> Result<(StatusCode, Bytes), String> {
    let (head, body) = answer_over(stream, request).await?.into_parts();
    Ok((head.status, body))
}

/// Sends a request over an existing connection and reads the whole answer, with its headers.
///
/// # Errors
/// What went wrong, in words.
pub async fn answer_over(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    request: Request<Full<Bytes>>,
) -> Result<Response<Bytes>, String> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
    let connection = tokio::spawn(connection);
    let answer = async {
        let (head, body) = sender.send_request(request).await.map_err(|e| e.to_string())?.into_parts();
        let body = body.collect().await.map_err(|e| e.to_string())?;
        Ok(Response::from_parts(head, body.to_bytes()))
    };
    let answer = answer.await;
    connection.abort();
    answer
}

/// Sends a request. Returns the headers of the answer.
///
/// # Errors
/// What went wrong, in words.
pub async fn headers(to: SocketAddr, request: Request<Full<Bytes>>) -> Result<HeaderMap, String> {
    Ok(head(to, request).await?.1)
}

/// Sends a request. Returns status and headers of the answer.
///
/// # Errors
/// What went wrong, in words.
pub async fn head(to: SocketAddr, request: Request<Full<Bytes>>) -> Result<(StatusCode, HeaderMap), String> {
    let stream = TcpStream::connect(to).await.map_err(|e| e.to_string())?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
    let connection = tokio::spawn(connection);
    let answer = sender.send_request(request).await.map_err(|e| e.to_string());
    connection.abort();
    let answer = answer?;
    Ok((answer.status(), answer.headers().clone()))
}

/// A connection for one request after another.
#[derive(Debug)]
pub struct Connection {
    sender: http1::SendRequest<Full<Bytes>>,
}

impl Connection {
    /// Opens a connection.
    ///
    /// # Errors
    /// What went wrong, in words.
    pub async fn open(to: SocketAddr) -> Result<Self, String> {
        let stream = TcpStream::connect(to).await.map_err(|e| e.to_string())?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
        tokio::spawn(connection);
        Ok(Self { sender })
    }

    /// Sends a request and reads the whole answer. Returns the answer's status.
    ///
    /// # Errors
    /// What went wrong, in words.
    pub async fn ask(&mut self, request: Request<Full<Bytes>>) -> Result<StatusCode, String> {
        Ok(self.ask_for_body(request).await?.0)
    }

    /// Sends a request and reads the whole answer. Returns the answer's status and body.
    ///
    /// # Errors
    /// What went wrong, in words.
    pub async fn ask_for_body(
        &mut self,
        request: Request<Full<Bytes>>,
    ) -> Result<(StatusCode, Bytes), String> {
        self.sender.ready().await.map_err(|e| e.to_string())?;
        let response = self.sender.send_request(request).await.map_err(|e| e.to_string())?;
        let status = response.status();
        let body = response.into_body().collect().await.map_err(|e| e.to_string())?;
        Ok((status, body.to_bytes()))
    }
}

/// Opens a websocket. Only the handshake is done; the caller does the rest.
///
/// # Panics
/// If the server does not accept it.
pub async fn websocket(to: SocketAddr) -> TcpStream {
    try_websocket(to).await.unwrap_or_else(|e| panic!("{e}"))
}

/// Opens a websocket that the server may refuse.
///
/// # Errors
/// What went wrong, in words. An answer other than 101 is an error.
pub async fn try_websocket(to: SocketAddr) -> Result<TcpStream, String> {
    let mut stream = TcpStream::connect(to).await.map_err(|e| format!("no connection: {e}"))?;
    stream.set_nodelay(true).map_err(|e| e.to_string())?;
    let head = "GET /ws HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n\
                sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    stream.write_all(head.as_bytes()).await.map_err(|e| format!("the handshake was not sent: {e}"))?;
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        let seen = String::from_utf8_lossy(&answer);
        let next = stream.read_u8().await.map_err(|e| format!("{e} after {seen:?}"))?;
        answer.push(next);
    }
    let answer = String::from_utf8_lossy(&answer);
    if answer.starts_with("HTTP/1.1 101 ") { Ok(stream) } else { Err(format!("no websocket: {answer}")) }
}

/// GETs a path.
///
/// # Errors
/// What went wrong, in words. An answer other than 200 is an error.
pub async fn get(from: SocketAddr, path: &str) -> Result<String, String> {
    let request =
        Request::get(path).header("host", "test").body(Full::default()).map_err(|e| e.to_string())?;
    let (status, body) = ask(from, request).await?;
    let body = String::from_utf8_lossy(&body).into_owned();
    if status == StatusCode::OK { Ok(body) } else { Err(format!("{status}: {body}")) }
}

/// POSTs bytes. Returns the answer's status and body.
///
/// # Errors
/// What went wrong, in words.
pub async fn post(
    to: SocketAddr,
    path: &str,
    content_type: &str,
    body: Bytes,
) -> Result<(StatusCode, String), String> {
    let request = Request::post(path).header("host", "test").header("content-type", content_type);
    let request = request.body(Full::new(body)).map_err(|e| e.to_string())?;
    let (status, body) = ask(to, request).await?;
    Ok((status, String::from_utf8_lossy(&body).into_owned()))
}
