// A file system that fails on purpose: preloaded, it counts what changes files under a folder (or what reads them), and at
// operation `at` kills the process, or lets one fail with EIO, or all from there on with ENOSPC.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, EIO_ONCE, ENOSPC_ON };
static char folder[PATH_MAX];
static volatile int armed = 0, mode = COUNT, reads = 0;
static volatile long at = 0, seen = 0;

void fault_arm(const char *under, int what, long n, int of_reads) {
  armed = 0;
  strncpy(folder, under, sizeof folder - 1);
  mode = what, at = n, seen = 0, reads = of_reads;
  armed = 1;
}
long fault_seen(void) { return seen; }
void fault_disarm(void) { armed = 0; }

#define REAL(type, name, ...) \
  static type (*real)(__VA_ARGS__) = NULL; \
  if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

static int inside(const char *path) {
  size_t n = strlen(folder);
  return n && !strncmp(path, folder, n) && (path[n] == '/' || !path[n]);
}
static int of_fd(int fd, const char *name) {  // whether an open file, or `name` in an open folder, is under the folder
  char link[64], path[PATH_MAX];
  if (name && name[0] == '/') return inside(name);
  if (fd == AT_FDCWD) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, sizeof path - 1);
  if (n <= 0) return 0;
  path[n] = 0;
  return inside(path);
}
// Whether this operation is to fail; errno says how. No room is no reason for what removes or flushes.
static int fails(int is_read, int takes_room, int here) {
  if (!armed || is_read != reads || !here) return 0;
  long n = __atomic_add_fetch(&seen, 1, __ATOMIC_SEQ_CST);
  if (mode == KILL && n == at) { kill(getpid(), SIGKILL); for (;;) pause(); }
  if (mode == EIO_ONCE && n == at) { errno = EIO; return 1; }
  if (mode == ENOSPC_ON && n >= at && takes_room) { errno = ENOSPC; return 1; }
  return 0;
}

#define OPEN(name) \
  int name(const char *path, int flags, ...) { \
    REAL(int, name, const char *, int, ...); \
    va_list v; va_start(v, flags); mode_t m = va_arg(v, mode_t); va_end(v); \
    int writes = (flags & O_ACCMODE) != O_RDONLY || (flags & O_CREAT); \
    if (fails(!writes, flags & O_CREAT, armed && of_fd(AT_FDCWD, path))) return -1; \
    return real(path, flags, m); }
#define OPENAT(name) \
  int name(int fd, const char *path, int flags, ...) { \
    REAL(int, name, int, const char *, int, ...); \
    va_list v; va_start(v, flags); mode_t m = va_arg(v, mode_t); va_end(v); \
    int writes = (flags & O_ACCMODE) != O_RDONLY || (flags & O_CREAT); \
    if (fails(!writes, flags & O_CREAT, armed && of_fd(fd, path))) return -1; \
    return real(fd, path, flags, m); }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)

#define ON_FD(type, name, is_read, room, bad, args, use, ...) \
  type name args { REAL(type, name, __VA_ARGS__); if (fails(is_read, room, armed && of_fd(fd, NULL))) return bad; return real use; }
ON_FD(ssize_t, write, 0, 1, -1, (int fd, const void *b, size_t n), (fd, b, n), int, const void *, size_t)
ON_FD(ssize_t, pwrite, 0, 1, -1, (int fd, const void *b, size_t n, off_t o), (fd, b, n, o), int, const void *, size_t, off_t)
ON_FD(ssize_t, pwrite64, 0, 1, -1, (int fd, const void *b, size_t n, off64_t o), (fd, b, n, o), int, const void *, size_t, off64_t)
ON_FD(ssize_t, writev, 0, 1, -1, (int fd, const struct iovec *b, int n), (fd, b, n), int, const struct iovec *, int)
ON_FD(ssize_t, pwritev, 0, 1, -1, (int fd, const struct iovec *b, int n, off_t o), (fd, b, n, o), int, const struct iovec *, int, off_t)
ON_FD(int, ftruncate, 0, 1, -1, (int fd, off_t n), (fd, n), int, off_t)
ON_FD(int, ftruncate64, 0, 1, -1, (int fd, off64_t n), (fd, n), int, off64_t)
ON_FD(int, fsync, 0, 0, -1, (int fd), (fd), int)
ON_FD(int, fdatasync, 0, 0, -1, (int fd), (fd), int)
ON_FD(ssize_t, read, 1, 0, -1, (int fd, void *b, size_t n), (fd, b, n), int, void *, size_t)
ON_FD(ssize_t, pread, 1, 0, -1, (int fd, void *b, size_t n, off_t o), (fd, b, n, o), int, void *, size_t, off_t)
ON_FD(ssize_t, pread64, 1, 0, -1, (int fd, void *b, size_t n, off64_t o), (fd, b, n, o), int, void *, size_t, off64_t)
ON_FD(DIR *, fdopendir, 1, 0, NULL, (int fd), (fd), int)

#define ON_PATH(type, name, is_read, room, bad, args, use, ...) \
  type name args { REAL(type, name, __VA_ARGS__); if (fails(is_read, room, armed && of_fd(AT_FDCWD, path))) return bad; return real use; }
ON_PATH(int, mkdir, 0, 1, -1, (const char *path, mode_t m), (path, m), const char *, mode_t)
ON_PATH(int, rmdir, 0, 0, -1, (const char *path), (path), const char *)
ON_PATH(int, unlink, 0, 0, -1, (const char *path), (path), const char *)
ON_PATH(int, rename, 0, 1, -1, (const char *path, const char *to), (path, to), const char *, const char *)
ON_PATH(DIR *, opendir, 1, 0, NULL, (const char *path), (path), const char *)
ON_PATH(int, stat, 1, 0, -1, (const char *path, struct stat *s), (path, s), const char *, struct stat *)
ON_PATH(int, lstat, 1, 0, -1, (const char *path, struct stat *s), (path, s), const char *, struct stat *)
ON_PATH(int, stat64, 1, 0, -1, (const char *path, struct stat64 *s), (path, s), const char *, struct stat64 *)
ON_PATH(int, lstat64, 1, 0, -1, (const char *path, struct stat64 *s), (path, s), const char *, struct stat64 *)

#define ON_AT(name, is_read, room, args, use, ...) \
  int name args { REAL(int, name, __VA_ARGS__); if (fails(is_read, room, armed && of_fd(fd, path))) return -1; return real use; }
ON_AT(mkdirat, 0, 1, (int fd, const char *path, mode_t m), (fd, path, m), int, const char *, mode_t)
ON_AT(unlinkat, 0, 0, (int fd, const char *path, int f), (fd, path, f), int, const char *, int)
ON_AT(renameat, 0, 1, (int fd, const char *path, int t, const char *to), (fd, path, t, to), int, const char *, int, const char *)
ON_AT(renameat2, 0, 1, (int fd, const char *path, int t, const char *to, unsigned f), (fd, path, t, to, f),
      int, const char *, int, const char *, unsigned)
ON_AT(fstatat, 1, 0, (int fd, const char *path, struct stat *s, int f), (fd, path, s, f), int, const char *, struct stat *, int)
ON_AT(fstatat64, 1, 0, (int fd, const char *path, struct stat64 *s, int f), (fd, path, s, f), int, const char *, struct stat64 *, int)
