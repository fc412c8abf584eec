/*
 * The floor of a download: connects to 127.0.0.1:PORT, asks for TARGET, and copies all that comes after the head to
 * stdout, 512 KiB at a time. It believes the server in everything but two: the status has to be 200, and where a
 * LENGTH is given, so many bytes of content have to come.
 *
 *     cc -O2 -o floor-client floor-client.c && ./floor-client PORT TARGET [LENGTH] > FILE
 */
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static char buffer[1 << 19];

static int put(const char *from, ssize_t length) {
  while (length > 0) {
    ssize_t written = write(1, from, length);
    if (written < 0) return -1;
    from += written;
    length -= written;
  }
  return 0;
}

int main(int argc, char **argv) {
  if (argc < 3) return 2;
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[1]))};
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  int fd = socket(AF_INET, SOCK_STREAM, 0);
  if (connect(fd, (struct sockaddr *)&address, sizeof address)) return perror("connect"), 7;
  int length = snprintf(buffer, sizeof buffer, "GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", argv[2]);
  if (send(fd, buffer, length, 0) != length) return perror("send"), 55;
  ssize_t got = recv(fd, buffer, sizeof buffer - 1, 0);
  if (got <= 0) return 56;
  buffer[got] = 0;
  char *content = strstr(buffer, "\r\n\r\n"); /* the head comes in one piece from this server */
  if (content == NULL) return 8;
  if (strncmp(buffer, "HTTP/1.", 7) != 0 || strncmp(buffer + 8, " 200 ", 5) != 0) return 22;
  content += 4;
  long long received = got - (content - buffer);
  if (put(content, received)) return perror("write"), 23;
  while ((got = recv(fd, buffer, sizeof buffer, 0)) > 0) {
    received += got;
    if (put(buffer, got)) return perror("write"), 23;
  }
  if (got < 0) return 56;
  return argc > 3 && received != atoll(argv[3]) ? 18 : 0;
}
