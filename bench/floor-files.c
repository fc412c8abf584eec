/*
 * The floor of a file server: what sendfile(2) alone costs. An epoll loop that takes what stands between the first
 * space and the second for a path below ROOT, opens it, sends a head and then the file, and closes it. It believes
 * everything (do not show it to a network), takes a read for one whole request, and answers 404 and closes where it
 * cannot open the file.
 *
 *     cc -O2 -o floor-files floor-files.c && ./floor-files PORT ROOT
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define CONNECTIONS_MAX 65536

/* What is still to be sent on a connection; without a file it waits for a request. */
static struct {
  int file, is_last;
  off_t at, size;
} sending[CONNECTIONS_MAX];
static int poll;

static void watch(int fd, int what, int operation) {
  struct epoll_event event = {.events = what, .data.fd = fd};
  epoll_ctl(poll, operation, fd, &event);
}

/* Sends as much as the kernel takes; the rest when it has room again. */
static void go_on(int fd) {
  while (sending[fd].at < sending[fd].size) {
    ssize_t sent = sendfile(fd, sending[fd].file, &sending[fd].at, sending[fd].size - sending[fd].at);
    if (sent > 0) continue;
    watch(fd, EPOLLOUT, EPOLL_CTL_MOD); /* a peer that has gone is an event too, and then read() tells */
    if (sent == 0) shutdown(fd, SHUT_RDWR); /* the file has shrunk */
    return;
  }
  close(sending[fd].file);
  sending[fd].file = 0;
  if (sending[fd].is_last) shutdown(fd, SHUT_WR); /* and the peer's end is read as that of a request */
}

static void end(int fd) {
  if (sending[fd].file > 0) close(sending[fd].file);
  sending[fd].file = 0;
  close(fd);
}

static void serve(int fd) {
  static char input[1 << 16], head[256];
  ssize_t length = read(fd, input, sizeof input - 1);
  if (length <= 0) {
    end(fd);
    return;
  }
  input[length] = 0;
  char *path = strchr(input, ' '), *space = path == NULL ? NULL : strchr(path + 1, ' ');
  if (space == NULL) {
    end(fd);
    return;
  }
  *space = 0;
  while (*++path == '/') {} /* relative to the folder that we are in */
  int file = open(path, O_RDONLY | O_CLOEXEC);
  struct stat status;
  if (file < 0 || fstat(file, &status) || !S_ISREG(status.st_mode)) {
    static const char missing[] = "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    if (file >= 0) close(file);
    if (send(fd, missing, sizeof missing - 1, MSG_NOSIGNAL) < 0) perror("send");
    end(fd);
    return;
  }
  int head_length = snprintf(head, sizeof head,
                             "HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: %lld\r\n"
                             "Date: Sun, 22 Nov 2026 12:00:00 GMT\r\n\r\n",
                             (long long)status.st_size);
  sending[fd].file = file;
  sending[fd].is_last = strstr(space + 1, "\r\nConnection: close\r\n") != NULL;
  sending[fd].at = 0;
  sending[fd].size = status.st_size;
  /* The kernel has room for a head: all before it has been taken. */
  if (send(fd, head, head_length, MSG_NOSIGNAL | (status.st_size > 0 ? MSG_MORE : 0)) != head_length) end(fd);
  else go_on(fd);
}

static void on_event(int fd, int what) {
  if (sending[fd].file == 0) serve(fd);
  else if (what & (EPOLLERR | EPOLLHUP)) end(fd);
  else {
    go_on(fd);
    if (sending[fd].file == 0) watch(fd, EPOLLIN, EPOLL_CTL_MOD);
  }
}

int main(int argc, char **argv) {
  if (argc < 3 || chdir(argv[2])) return perror("usage: floor-files PORT ROOT"), 2;
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  signal(SIGPIPE, SIG_IGN);
  int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
  poll = epoll_create1(0);
  address.sin_port = htons(atoi(argv[1]));
  setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 512)) return perror("listen"), 1;
  watch(listener, EPOLLIN, EPOLL_CTL_ADD);
  struct epoll_event events[1024];
  for (;;) {
    int ready = epoll_wait(poll, events, 1024, -1);
    for (int i = 0; i < ready; i++) {
      int fd = events[i].data.fd;
      if (fd != listener) {
        on_event(fd, events[i].events);
        continue;
      }
      fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
      if (fd < 0) continue;
      if (fd >= CONNECTIONS_MAX) {
        close(fd);
        continue;
      }
      setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
      sending[fd].file = 0;
      watch(fd, EPOLLIN, EPOLL_CTL_ADD);
    }
  }
}
