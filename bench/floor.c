/*
 * The floor: what the kernel alone costs. An epoll loop that parses nothing: it counts the ends of heads in what it
 * has read and answers as many times, from a buffer that was made beforehand. No server that reads its requests can
 * be cheaper; what it lacks is everything.
 *
 *     cc -O2 -o floor floor.c && ./floor PORT
 */
#define _GNU_SOURCE
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define ANSWERS_MAX 4096
#define CONNECTIONS_MAX 65536

static const char answer[] = "HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: 13\r\n"
                             "Date: Sun, 22 Nov 2026 12:00:00 GMT\r\n\r\nHello, World!";
static char input[1 << 19], output[ANSWERS_MAX * sizeof answer];
static unsigned char matched[CONNECTIONS_MAX]; /* how much of "\r\n\r\n" a connection's last read ended with */

static void serve(int fd) {
  ssize_t length = read(fd, input, sizeof input);
  if (length <= 0) {
    close(fd);
    return;
  }
  size_t answers = 0;
  for (ssize_t i = 0; i < length; i++) {
    matched[fd] = input[i] == "\r\n\r\n"[matched[fd]] ? matched[fd] + 1 : input[i] == '\r';
    if (matched[fd] < 4) continue;
    matched[fd] = 0;
    answers++;
  }
  if (answers > ANSWERS_MAX) answers = ANSWERS_MAX;
  /* A short write would lose answers: the load that is used never lets that much wait. */
  if (write(fd, output, answers * (sizeof answer - 1)) < 0) close(fd);
}

int main(int argc, char **argv) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0), poll = epoll_create1(0);
  address.sin_port = htons(argc > 1 ? atoi(argv[1]) : 8888);
  setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 512)) return perror("listen"), 1;
  for (size_t i = 0; i < ANSWERS_MAX; i++) memcpy(output + i * (sizeof answer - 1), answer, sizeof answer - 1);
  struct epoll_event event = {.events = EPOLLIN, .data.fd = listener}, events[1024];
  epoll_ctl(poll, EPOLL_CTL_ADD, listener, &event);
  fprintf(stderr, "Listening on http://127.0.0.1:%d\n", ntohs(address.sin_port));
  for (;;) {
    int ready = epoll_wait(poll, events, 1024, -1);
    for (int i = 0; i < ready; i++) {
      if (events[i].data.fd != listener) {
        serve(events[i].data.fd);
        continue;
      }
      event.data.fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
      if (event.data.fd < 0 || event.data.fd >= CONNECTIONS_MAX) continue;
      setsockopt(event.data.fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
      matched[event.data.fd] = 0;
      epoll_ctl(poll, EPOLL_CTL_ADD, event.data.fd, &event);
    }
  }
}
