/* Preloaded: opening and reading some files fails or hangs, as on storage that is out of order.

   STORAGE_FAULT names a file; while it exists, each of its lines is `CALL ERRNO PART`: CALL (open or read) of paths that
   contain PART fails with ERRNO, or hangs if ERRNO is 0. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int fault(const char *call, const char *path) {
    const char *control = getenv("STORAGE_FAULT");
    while (control != NULL && access(control, F_OK) == 0) {
        char own[16], part[1024];
        int number, hangs = 0;
        FILE *lines = fopen(control, "r");
        if (lines == NULL) return 0;
        while (fscanf(lines, "%15s %d %1023s", own, &number, part) == 3) {
            if (strcmp(own, call) != 0 || strstr(path, part) == NULL) continue;
            if (number != 0) {
                fclose(lines);
                return number;
            }
            hangs = 1;
        }
        fclose(lines);
        if (!hangs) return 0;
        usleep(20000);
    }
    return 0;
}

#define OPEN(name)                                                                     \
    int name(const char *path, int flags, ...) {                                       \
        va_list arguments;                                                             \
        va_start(arguments, flags);                                                    \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(arguments, mode_t) : 0;   \
        va_end(arguments);                                                             \
        int number = fault("open", path);                                              \
        if (number != 0) {                                                             \
            errno = number;                                                            \
            return -1;                                                                 \
        }                                                                              \
        int (*next)(const char *, int, ...) = dlsym(RTLD_NEXT, #name);                 \
        return next(path, flags, mode);                                                \
    }

OPEN(open)
OPEN(open64)

ssize_t read(int descriptor, void *target, size_t count) {
    static ssize_t (*next)(int, void *, size_t);
    if (next == NULL) next = dlsym(RTLD_NEXT, "read");
    if (getenv("STORAGE_FAULT") != NULL) {
        char link[64], path[4096];
        snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
        ssize_t length = readlink(link, path, sizeof path - 1);
        path[length > 0 ? length : 0] = 0;
        int number = fault("read", path);
        if (number != 0) {
            errno = number;
            return -1;
        }
    }
    return next(descriptor, target, count);
}
